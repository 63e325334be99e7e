// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.system;

public final class ErrnoException extends Exception {}
