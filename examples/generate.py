"""Let models continue a line of text. Needs only transformers: a folder that permprune wrote is an ordinary checkpoint.

python examples/generate.py FOLDER [FOLDER ...]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPT = "The film begins in a small town where"

disable_progress_bar()
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"{folder}:\n  {' '.join(text.split())}")
