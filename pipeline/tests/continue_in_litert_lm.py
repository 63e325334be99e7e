"""Run by a Python that has litert-lm-api: ``FILE TOKENS``, prompts as JSON on standard input; prints ids and texts as JSON."""

import json
import sys

import litert_lm

litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
greedy = litert_lm.SamplerConfig(top_k=1, temperature=1.0)
found = []
with litert_lm.Engine(sys.argv[1], backend=litert_lm.Backend.CPU(thread_count=1)) as engine:
    for prompt in json.load(sys.stdin):
        with engine.create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=int(sys.argv[2])) as session:
            session.run_prefill([prompt])
            text = session.run_decode().texts[0]
        found.append({"prompt": engine.tokenize(prompt), "text": text})
print(json.dumps(found))
