"""Run by a Python that has onnxruntime-genai: ``FOLDER TOKENS``, prompts as JSON on standard input; prints ids and texts as JSON."""

import json
import sys

import onnxruntime_genai as og

model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
found = []
for prompt in json.load(sys.stdin):
    ids = [int(token) for token in tokenizer.encode(prompt)]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + int(sys.argv[2]))
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    new = [int(token) for token in generator.get_sequence(0)][len(ids) :]
    found.append({"prompt": ids, "new": new, "text": tokenizer.decode(new)})
print(json.dumps(found))
