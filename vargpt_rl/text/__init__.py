"""Text by the language half of a model: replies, answers and judgements, from transformers or from vLLM alike."""
