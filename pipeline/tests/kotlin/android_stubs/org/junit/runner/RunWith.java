// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package org.junit.runner;

import java.lang.annotation.*;

@Retention(RetentionPolicy.RUNTIME)
@Target(ElementType.TYPE)
public @interface RunWith {
    Class<? extends Runner> value();
}
