// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.os;

public class Build {
    public static class VERSION {
        public static final int SDK_INT = Integer.parseInt("0");
    }

    public static class VERSION_CODES {
        public static final int O_MR1 = 27;
    }
}
