package pocketlm

import java.io.Closeable
import java.io.DataInputStream
import java.io.EOFException
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.zip.ZipException
import java.util.zip.ZipFile

/** A numpy `.npz`: a zip of `.npy` arrays, of which no more than asked for stands in memory. */
class Npz(private val file: File) : Closeable {
    private val zip = try {
        ZipFile(file)
    } catch (error: IOException) { // a ZipException is one too
        throw ModelException("$file: missing or no .npz (${error.message}); copy it again", error)
    }

    /** The array called [name], to be read from its beginning. */
    fun array(name: String): NpyStream {
        val entry = zip.getEntry("$name.npy") ?: throw ModelException("${file.name}: has no $name; it was made for something else")
        return NpyStream(DataInputStream(zip.getInputStream(entry).buffered(1 shl 16)), "${file.name}, $name")
    }

    override fun close() = zip.close()
}

/**
 * An array of float32, int32 or int64 in C order, read from front to back.
 *
 * Source: numpy's format specification, versions 1 and 2 (numpy.lib.format).
 */
class NpyStream(private val stream: DataInputStream, private val name: String) : Closeable {
    val shape: List<Int>
    private val type: String

    init {
        val magic = bytes(8)
        if (!magic.copyOf(6).contentEquals(MAGIC)) throw damaged("it does not begin as an .npy")
        val length = little(bytes(if (magic[6].toInt() == 1) 2 else 4)).let { if (it.limit() == 2) it.short.toInt() and 0xFFFF else it.int }
        val header = String(bytes(length), Charsets.ISO_8859_1)
        type = DESCR.find(header)?.groupValues?.get(1) ?: throw damaged("no type in $header")
        if (type !in SIZES || "'fortran_order': False" !in header) throw damaged("arrays are float32, int32 or int64 in C order: $header")
        val sizes = SHAPE.find(header)?.groupValues?.get(1) ?: throw damaged("no shape in $header")
        shape = sizes.split(',').map { it.trim() }.filter { it.isNotEmpty() }.map { it.toInt() }
    }

    fun floats(count: Int): FloatArray {
        if (type != "<f4") throw damaged("it is $type, not float32")
        return FloatArray(count).also { little(bytes(4 * count)).asFloatBuffer().get(it) }
    }

    fun ints(count: Int): IntArray {
        val size = SIZES.getValue(type)
        if (type == "<f4") throw damaged("it is float32, not whole numbers")
        val block = little(bytes(size * count))
        return IntArray(count) { if (size == 4) block.getInt(4 * it) else block.getLong(8 * it).toInt() }
    }

    override fun close() = stream.close()

    private fun bytes(count: Int): ByteArray = try {
        ByteArray(count).also(stream::readFully)
    } catch (error: EOFException) {
        throw damaged("it ends too early")
    } catch (error: ZipException) {
        throw damaged(error.message ?: "its zip is damaged")
    }

    private fun little(bytes: ByteArray): ByteBuffer = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)

    private fun damaged(reason: String) = ModelException("$name: $reason; copy it again")

    private companion object {
        val MAGIC = byteArrayOf(-0x6D) + "NUMPY".toByteArray() // 0x93
        val SIZES = mapOf("<f4" to 4, "<i4" to 4, "<i8" to 8)
        val DESCR = Regex("'descr': '([^']*)'")
        val SHAPE = Regex("'shape': \\(([0-9, ]*)\\)")
    }
}
