package pocketlm

import java.io.IOException

/** What a person can do something about: a missing or changed file, a prompt that is too long. One line, with the file's name. */
open class ModelException(message: String, cause: Throwable? = null) : IOException(message, cause)
