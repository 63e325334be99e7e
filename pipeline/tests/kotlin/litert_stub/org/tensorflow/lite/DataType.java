// The signature that LiteRT publishes for its Interpreter API. Calls go to a process of ours that runs the real LiteRT.
package org.tensorflow.lite;

public enum DataType {
    FLOAT32,
    INT32,
    UINT8,
    INT64,
    STRING,
    BOOL,
    INT16,
    INT8
}
