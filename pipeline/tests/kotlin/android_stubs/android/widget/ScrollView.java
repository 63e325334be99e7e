// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package android.widget;

public class ScrollView extends android.view.ViewGroup {
    public ScrollView(android.content.Context context) {
        super(context);
    }
}
