// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.widget;

public class EditText extends TextView {
    public EditText(android.content.Context context) {
        super(context);
    }

    @Override
    public android.text.Editable getText() { throw new RuntimeException("Stub!"); }
}
