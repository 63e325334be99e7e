"""What runs on the device: open an artifact in one runtime, replay golden vectors, measure, say pass or fail.

The folder is copied to a board as it is; it needs Python 3.9, numpy and one of onnxruntime, ai-edge-litert, tflite-runtime:

    python -m device_tests --artifact onnx_static_int8.json --golden golden --runtime onnxruntime --out result.json
"""
