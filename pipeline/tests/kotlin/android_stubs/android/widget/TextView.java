// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.widget;

public class TextView extends android.view.View {
    public TextView(android.content.Context context) {
        super(context);
    }

    public CharSequence getText() { throw new RuntimeException("Stub!"); }

    public final void setText(CharSequence text) { throw new RuntimeException("Stub!"); }

    public final void setText(int resid) { throw new RuntimeException("Stub!"); }

    public final void setHint(int resid) { throw new RuntimeException("Stub!"); }

    public final void append(CharSequence text) { throw new RuntimeException("Stub!"); }
}
