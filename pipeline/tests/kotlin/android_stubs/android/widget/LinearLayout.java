// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.widget;

public class LinearLayout extends android.view.ViewGroup {
    public LinearLayout(android.content.Context context) {
        super(context);
    }

    public static final int VERTICAL = 1;

    public void setOrientation(int orientation) { throw new RuntimeException("Stub!"); }

    public int getOrientation() { throw new RuntimeException("Stub!"); }
}
