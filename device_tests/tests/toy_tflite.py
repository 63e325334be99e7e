"""The toy as TFLite: ``python -m device_tests.tests.toy_tflite FILE``. In a process of its own, because TensorFlow must not be
imported where tflite-runtime is."""

import sys
from pathlib import Path

import tensorflow as tf

from device_tests.tests.toy import CONTEXT, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, PREFILL, ToyModel, write_sidecar


class ToyModule(tf.Module):
    """The signatures of the TFLite contract over the toy's weights."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens, positions, mask, caches):
        count = tokens.shape[1]
        hidden = tf.gather(self.model.embedding, tokens[0]) + tf.gather(self.model.position, positions[0])  # [n, hidden]
        fresh = {}
        for index, layer in enumerate(self.model.layers):
            query = tf.transpose(tf.reshape(hidden @ layer["q"], (count, HEADS, HEAD_DIM)), (1, 0, 2))
            keys, values = hidden @ layer["k"], hidden @ layer["v"]  # [n, head_dim]
            fresh[f"new_k_{index}"], fresh[f"new_v_{index}"] = keys[None, None], values[None, None]
            all_keys = tf.concat([caches[f"k_{index}"][0, 0], keys], axis=0)  # [context + n, head_dim]
            all_values = tf.concat([caches[f"v_{index}"][0, 0], values], axis=0)
            scores = tf.matmul(query, tf.tile(all_keys[None], (HEADS, 1, 1)), transpose_b=True) / HEAD_DIM**0.5 + mask[0]
            mixed = tf.matmul(tf.nn.softmax(scores), tf.tile(all_values[None], (HEADS, 1, 1)))
            hidden = hidden + tf.reshape(tf.transpose(mixed, (1, 0, 2)), (count, HIDDEN)) @ layer["o"]
        return hidden, fresh

    @tf.function
    def prefill(self, tokens, positions, mask, last, **caches):
        hidden, fresh = self.forward(tokens, positions, mask, caches)
        return {"logits": tf.gather(hidden, last) @ self.model.head, **fresh}

    @tf.function
    def decode(self, tokens, positions, mask, **caches):
        hidden, fresh = self.forward(tokens, positions, mask, caches)
        return {"logits": hidden @ self.model.head, **fresh}


def write_tflite(model: ToyModel, path: Path) -> None:
    module = ToyModule(model)
    cache = tf.TensorSpec((1, KV_HEADS, CONTEXT, HEAD_DIM), tf.float32)

    def specs(width: int) -> dict:
        found = {"tokens": tf.TensorSpec((1, width), tf.int32), "positions": tf.TensorSpec((1, width), tf.int32)}
        found["mask"] = tf.TensorSpec((1, 1, width, CONTEXT + width), tf.float32)
        return {**found, **{f"{kind}_{layer}": cache for layer in range(LAYERS) for kind in "kv"}}

    last = tf.TensorSpec((1,), tf.int32)
    signatures = {"decode": module.decode.get_concrete_function(**specs(1))}
    signatures |= {f"prefill_{width}": module.prefill.get_concrete_function(last=last, **specs(width)) for width in PREFILL}
    saved = path.parent / "saved"
    tf.saved_model.save(module, str(saved), signatures=signatures)
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=list(signatures)).convert())
    write_sidecar(path, "tflite")


if __name__ == "__main__":
    write_tflite(ToyModel(), Path(sys.argv[1]))
