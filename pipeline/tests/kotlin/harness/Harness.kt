package pocketlm

import java.io.File
import java.io.StringReader
import java.lang.reflect.InvocationTargetException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.joinAll
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.yield

/** Runs the library on a JVM: a request `{"what": ..., ...}` a line on stdin, an answer a line on stdout, until stdin ends. */
fun main() {
    for (line in generateSequence(::readLine)) {
        val answer = try {
            val request = Asked(JsonReader(StringReader(line)).readValue() as Map<*, *>)
            mapOf("answer" to ANSWERS.getValue(request.text("what"))(request))
        } catch (error: Throwable) { // also an AssertionError: the test shows it
            mapOf("crash" to error.stackTraceToString())
        }
        println(json(answer))
    }
}

private val ANSWERS: Map<String, (Asked) -> Any?> = mapOf(
    "json" to { it.texts("texts").map(::parsed) },
    "encode" to ::encode,
    "decode" to ::decode,
    "utf8" to { asked -> asked.list("streams").map(::utf8) },
    "stop" to { asked -> asked.parts("cases").map(::stop) },
    "random" to { asked -> asked.list("seeds").map { seed -> Pcg64(seed as Long).let { random -> List(20) { random.nextDouble() } } } },
    "sample" to { asked -> asked.parts("cases").map(::sample) },
    "verify" to { asked -> asked.texts("paths").map { told { Manifest.read(asked.file("root")).verified(asked.file("root"), it).path } } },
    "calls" to { asked -> asked.ints("tokens").map { promptCalls(it, asked.ints("lengths").toList()) } },
    "matrices" to ::matrices,
    "link" to ::link,
    "npz" to ::npz,
    "open" to ::open,
    "generate" to ::generate,
    "flow" to ::flows,
    "replay" to ::replay,
)

/** The members of a request. */
private class Asked(private val members: Map<*, *>) {
    fun has(name: String) = members[name] != null
    fun text(name: String) = members[name] as String
    fun file(name: String) = File(text(name))
    fun list(name: String) = members[name] as List<*>
    fun texts(name: String) = list(name).map { it as String }
    fun ints(name: String) = ints(list(name))
    fun number(name: String) = (members[name] as Number).toDouble()
    fun whole(name: String) = members[name] as Long
    fun parts(name: String) = list(name).map { Asked(it as Map<*, *>) }
    fun part(name: String) = Asked(members[name] as Map<*, *>)
}

private fun ints(values: List<*>) = IntArray(values.size) { (values[it] as Long).toInt() }

/** What [work] gives, or `{"refused": message}`. */
private fun told(work: () -> Any?): Any? = try {
    work()
} catch (error: ModelException) {
    mapOf("refused" to error.message)
} catch (error: IllegalArgumentException) {
    mapOf("illegal" to error.message)
}

private fun parsed(text: String): Any? = told {
    JsonReader(StringReader(text)).let { reader -> reader.readValue().also { reader.end() } }.let { mapOf("value" to it) }
}

private fun tokenizer(asked: Asked) = Tokenizer.read(asked.file("tokenizer"), asked.file("rules"))

private fun encode(asked: Asked): Any? {
    val tokenizer = tokenizer(asked)
    return asked.texts("documents").map { tokenizer.encode(it).toList() }
}

private fun decode(asked: Asked): Any? {
    val tokenizer = tokenizer(asked)
    return asked.list("sequences").map { tokenizer.decode(ints(it as List<*>)) }
}

/** Every stream is a list of chunks of bytes; its text comes back in as many pieces and what was left. */
private fun utf8(chunks: Any?): List<String> {
    val stream = Utf8Stream()
    return (chunks as List<*>).map { chunk -> stream.push(ints(chunk as List<*>).map(Int::toByte).toByteArray()) } + stream.finish()
}

private fun stop(case: Asked): Any? {
    val stops = StopText(case.texts("stops"))
    val pieces = case.texts("pieces").map(stops::push)
    return mapOf("pieces" to pieces, "stopped" to stops.stopped, "rest" to stops.finish())
}

private fun sample(case: Asked): Any? = told {
    val logits = FloatArray(case.list("logits").size) { (case.list("logits")[it] as Number).toFloat() }
    val sampling = Sampling(case.number("temperature"), case.whole("top_k").toInt(), case.number("top_p"))
    case.list("uniforms").map { uniform -> nextToken(logits, sampling) { (uniform as Number).toDouble() } }
}

private fun matrices(asked: Asked): Any? = PromptMatrices(asked.file("data")).use { made ->
    asked.parts("matrices").map { matrix ->
        fun optional(name: String) = if (matrix.has(name)) matrix.whole(name) else null
        val (inputs, outputs) = matrix.whole("inputs").toInt() to matrix.whole("outputs").toInt()
        val wanted = PromptMatrix(
            "", inputs, outputs, matrix.whole("blocks").toInt(), matrix.whole("block").toInt(), matrix.whole("bits").toInt(),
            matrix.whole("codes"), matrix.whole("scales"), optional("zeros"), optional("row_scale"),
        )
        val target = ByteBuffer.allocateDirect(inputs * outputs).order(ByteOrder.nativeOrder())
        made.write(wanted, target)
        List(inputs * outputs) { target.get(it).toInt() }
    }
}

/** What Gradle's scripts do with their own helper, a class of the default package: so by its name. */
private fun link(asked: Asked): Any? = try {
    val kind = Class.forName("ModelFiles")
    val files = kind.getConstructor(File::class.java, String::class.java).newInstance(asked.file("bundle"), asked.text("artifact"))
    kind.getMethod("link", File::class.java).invoke(files, asked.file("assets"))
    mapOf("runtime" to kind.getMethod("getRuntime").invoke(files), "too_large" to kind.getMethod("getTooLarge").invoke(files))
} catch (error: InvocationTargetException) {
    mapOf("illegal" to error.cause!!.message)
}

private fun npz(asked: Asked): Any? = told {
    Npz(asked.file("file")).use { npz ->
        asked.parts("arrays").associate { array ->
            array.text("name") to npz.array(array.text("name")).use { stream ->
                val count = stream.shape.fold(1, Int::times)
                val values = if (array.text("type") == "float") stream.floats(count).toList() else stream.ints(count).toList()
                mapOf("shape" to stream.shape, "values" to values)
            }
        }
    }
}

private fun options(asked: Asked) = OpenOptions(
    threads = 1,
    artifact = if (asked.has("artifact")) asked.text("artifact") else null,
    manifestSha256 = if (asked.has("manifest_sha256")) asked.text("manifest_sha256") else null,
)

private fun open(asked: Asked): Any? = told { LanguageModel.open(asked.file("folder"), options(asked)).use { it.artifact.name } }

private fun generateOptions(asked: Asked) = GenerateOptions(
    maxTokens = asked.whole("max_tokens").toInt(),
    temperature = asked.number("temperature"),
    topK = asked.whole("top_k").toInt(),
    topP = asked.number("top_p"),
    seed = asked.whole("seed"),
    stop = if (asked.has("stop")) asked.texts("stop") else emptyList(),
    stopIds = if (asked.has("stop_ids")) asked.ints("stop_ids").toSet() else emptySet(),
)

/** Every run of a model opened once: its tokens, its text, how it ended. */
private fun generate(asked: Asked): Any? = told {
    LanguageModel.open(asked.file("folder"), options(asked)).use { model ->
        asked.parts("runs").map { run ->
            told {
                val chosen = generateOptions(run)
                val flow = if (run.has("ids")) model.generate(run.ints("ids"), chosen) else model.generate(run.text("prompt"), chosen)
                val tokens = runBlocking { flow.toList() }
                described(model, tokens)
            }
        }
    }
}

private fun described(model: LanguageModel, tokens: List<Token>): Map<String, Any?> {
    val cost = model.statistics!!
    return mapOf(
        "ids" to tokens.mapNotNull { it.id },
        "text" to tokens.joinToString("") { it.text },
        "ended" to cost.ended?.name,
        "new_tokens" to cost.newTokens,
        "timed" to (cost.firstTokenMs != null && cost.firstTokenMs > 0),
    )
}

/** What a Flow must do: end when its collector goes, end on cancel(), wait for its turn, refuse a closed model. */
private fun flows(asked: Asked): Any? {
    val model = LanguageModel.open(asked.file("folder"), options(asked))
    val run = asked.part("run")
    val long = generateOptions(run)
    val ids = run.ints("ids")
    val taken = runBlocking { model.generate(ids, long).take(3).toList() }.mapNotNull { it.id }
    val cancelled = ArrayList<Int>()
    runBlocking {
        model.generate(ids, long).collect { token ->
            token.id?.let(cancelled::add)
            if (cancelled.size == 4) model.cancel()
        }
    }
    val ended = model.statistics!!.ended!!.name
    val beside = ArrayList<Int>()
    runBlocking {
        val replayed = launch(start = CoroutineStart.LAZY) { model.replay(asked.file("golden")) }
        model.generate(ids, long).collect { token ->
            token.id?.let(beside::add)
            if (beside.size == 2) replayed.start() // must not touch the cache before the text is done
            yield()
        }
        replayed.join()
    }
    var left = 0
    var thrown = false
    runBlocking {
        val job = launch {
            try {
                model.generate(ids, long).collect { if (++left == 2) throw CancellationException("enough") }
            } catch (error: CancellationException) {
                thrown = true
                throw error
            }
        }
        job.join()
        job.cancelAndJoin()
    }
    val together = List(3) { ArrayList<Int>() }
    runBlocking { together.map { mine -> launch { model.generate(ids, long).collect { it.id?.let(mine::add) } } }.joinAll() }
    model.close()
    model.close()
    val closed = try {
        runBlocking { model.generate(ids, long).toList() }.size.toString()
    } catch (error: IllegalStateException) {
        error.message
    }
    return mapOf(
        "taken" to taken, "cancelled" to cancelled, "ended" to ended, "left" to left, "thrown" to thrown, "together" to together,
        "closed" to closed, "beside" to beside,
    )
}

private fun replay(asked: Asked): Any? = told {
    LanguageModel.open(asked.file("folder"), options(asked)).use { model ->
        val result = runBlocking { model.replay(asked.file("golden")) }
        mapOf(
            "max_abs_diff" to result.maxAbsDiff, "worst" to result.worst, "kl" to result.kl, "kl_stderr" to result.klStderr,
            "top1" to result.top1, "tokens" to result.tokens, "greedy_prefix" to result.greedyPrefix,
            "greedy_tokens" to result.greedyTokens, "failures" to result.failures,
        )
    }
}

private fun writeJson(out: StringBuilder, value: Any?) {
    when (value) {
        is Map<*, *> -> value.entries.joinTo(out, ",", "{", "}") { (key, each) -> "${json(key.toString())}:${json(each)}" }
        is List<*> -> value.joinTo(out, ",", "[", "]", transform = ::json)
        is String -> {
            out.append('"')
            for (character in value) {
                val plain = character in ' '..'~' && character != '"' && character != '\\'
                if (plain) out.append(character) else out.append("\\u%04x".format(character.code))
            }
            out.append('"')
        }
        is Double -> out.append(if (value.isNaN()) "\"nan\"" else if (value.isInfinite()) "\"inf\"" else value.toString())
        is Float -> out.append(value.toDouble().toString())
        null, is Number, is Boolean -> out.append(value)
        else -> throw IllegalArgumentException("no JSON for ${value::class}")
    }
}

private fun json(value: Any?): String = StringBuilder().also { writeJson(it, value) }.toString()
