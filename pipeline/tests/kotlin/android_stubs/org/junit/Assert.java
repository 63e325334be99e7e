// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package org.junit;

public class Assert {
    public static void assertTrue(String message, boolean condition) { throw new RuntimeException("Stub!"); }

    public static void assertEquals(Object expected, Object actual) { throw new RuntimeException("Stub!"); }

    public static <T extends Throwable> T assertThrows(
            Class<T> expectedThrowable, org.junit.function.ThrowingRunnable runnable) { throw new RuntimeException("Stub!"); }
}
