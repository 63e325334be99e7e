plugins {
    alias(libs.plugins.android.aipack)
}

// Now, and not in a task: packs take src/main/assets as it lies there.
val files = ModelFiles(rootDir.parentFile, providers.gradleProperty("pocketlm.artifact").get())
files.tooLarge?.let { throw GradleException(it) }
files.link(file("src/main/assets"))

aiPack {
    packName.set("model")
    dynamicDelivery {
        deliveryType.set("install-time") // or fast-follow, on-demand: then open the pack's folder, see ModelAssets.kt
    }
}
