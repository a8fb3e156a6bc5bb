"""VARGPT v1: the first family of the model (LLaVA-1.5, a VAR decoder, indices of a codebook as image tokens)."""
