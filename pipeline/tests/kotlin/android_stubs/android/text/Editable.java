// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.text;

public interface Editable extends CharSequence {}
