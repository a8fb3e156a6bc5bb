"""Draw an image and ask about it, in Python: ``python examples/draw_and_ask.py [CHECKPOINT]``."""

import sys

from vargpt_rl.inference.conversation import Conversation, load
from vargpt_rl.model.drawing_defaults import read_defaults
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.hub import check_model

folder = check_model(sys.argv[1] if len(sys.argv) > 1 else "tiny")
known = read_defaults(folder)
side = known.resolution or 512
sampling = SamplingConfig(cfg=3.0 if known.cfg is None else known.cfg)
model, chat = load(folder)

words, drawn = Conversation(model, chat, (side, side), sampling).say("a large red circle", draw=True)
drawn.image.save("circle.png")
print(words, "circle.png")
print(*Conversation(model, chat, (side, side), sampling).say("what colour is the circle?", [drawn.image]))
