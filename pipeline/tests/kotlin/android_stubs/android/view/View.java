// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.view;

public class View {
    public interface OnClickListener {
        void onClick(View v);
    }

    public View(android.content.Context context) { throw new RuntimeException("Stub!"); }

    public void setEnabled(boolean enabled) { throw new RuntimeException("Stub!"); }

    public boolean isEnabled() { throw new RuntimeException("Stub!"); }

    public void setOnClickListener(OnClickListener l) { throw new RuntimeException("Stub!"); }

    public void setFitsSystemWindows(boolean fitSystemWindows) { throw new RuntimeException("Stub!"); }

    public boolean getFitsSystemWindows() { throw new RuntimeException("Stub!"); }
}
