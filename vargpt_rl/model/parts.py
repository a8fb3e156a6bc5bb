"""Parts of the model, by the prefixes of their tensors' names."""

PROJECTORS = ("projector_in.", "projector_out.")
DECODER = ("image_decoder.",)
LANGUAGE = ("model.language_model.", "lm_head.")
# Of v1.1 and v1, whose vision towers have different names.
VISION = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
VISION_PROJECTOR = ("model.visual.merger.", "model.multi_modal_projector.")
IMAGE_TOKENIZER = "image_tokenizer"

PARTS = {"language_model": LANGUAGE, "vision_tower": VISION, "image_decoder": DECODER, "projectors": PROJECTORS}
"""Parts that an adapter may serve, by the names that a user gives them."""
