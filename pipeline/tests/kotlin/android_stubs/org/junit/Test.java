// Android's published signature (API 35), so that the module compiles where there is no Android SDK. Nothing here runs.
package org.junit;

import java.lang.annotation.*;

@Retention(RetentionPolicy.RUNTIME)
@Target(ElementType.METHOD)
public @interface Test {}
