// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.view;

public abstract class ViewGroup extends View {
    public ViewGroup(android.content.Context context) {
        super(context);
    }

    public void addView(View child) { throw new RuntimeException("Stub!"); }
}
