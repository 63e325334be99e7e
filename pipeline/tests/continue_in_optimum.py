"""Run by a Python that has optimum-onnx: ``FOLDER TOKENS``, prompts as JSON on standard input; prints ids and texts as JSON."""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = []
for prompt in json.load(sys.stdin):
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    made = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=int(sys.argv[2]), do_sample=False
    )
    new = made[0].tolist()[len(ids) :]
    found.append({"prompt": ids, "new": new, "text": tokenizer.decode(new)})
print(json.dumps(found))
