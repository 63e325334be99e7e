// The signature that LiteRT publishes for its Interpreter API. Calls go to a process of ours that runs the real LiteRT.
package org.tensorflow.lite;

public interface Tensor {
    DataType dataType();

    int[] shape();

    int numBytes();
}
