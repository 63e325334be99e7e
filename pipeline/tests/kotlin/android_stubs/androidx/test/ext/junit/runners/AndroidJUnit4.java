// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package androidx.test.ext.junit.runners;

public final class AndroidJUnit4 extends org.junit.runner.Runner {}
