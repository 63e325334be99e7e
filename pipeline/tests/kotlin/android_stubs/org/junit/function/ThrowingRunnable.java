// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package org.junit.function;

public interface ThrowingRunnable {
    void run() throws Throwable;
}
