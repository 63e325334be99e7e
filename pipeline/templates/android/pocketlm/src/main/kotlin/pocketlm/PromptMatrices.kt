package pocketlm

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * Makes the int8 matrices `[inputs, outputs]` of a hybrid's prompt graph out of the decode graph's file of weights, which is mapped:
 * `rint((code - zero) * scale / rowScale)`, transposed. The counterpart of `device_tests/onnx_hybrid.py`.
 */
internal class PromptMatrices(data: File) : AutoCloseable {
    private val file = RandomAccessFile(data, "r")

    override fun close() = file.close()

    /** Writes [matrix] into [target], which has `inputs * outputs` bytes. */
    fun write(matrix: PromptMatrix, target: ByteBuffer) {
        val perRow = matrix.blocks * matrix.block * matrix.bits / 8
        val codes = map(matrix.codes, matrix.outputs.toLong() * perRow)
        val values = if (matrix.rowScale == null) null else Requantised(matrix)
        val packed = ByteArray(perRow)
        val row = ByteArray(matrix.inputs)
        val tile = ByteArray(TILE_ROWS * matrix.inputs) // [inputs, rows of the tile]
        for (start in 0 until matrix.outputs step TILE_ROWS) {
            val rows = minOf(TILE_ROWS, matrix.outputs - start)
            for (place in 0 until rows) {
                codes.get(packed)
                if (values == null) signed(packed, row) else values.fill(packed, start + place, row)
                for (input in row.indices) tile[input * rows + place] = row[input]
            }
            for (input in 0 until matrix.inputs) {
                target.seek(input * matrix.outputs + start)
                target.put(tile, input * rows, rows)
            }
        }
        target.seek(0)
    }

    /** Codes of 8 bits whose middle is 128, without a scale of their own: less 128 they are the numbers. */
    private fun signed(packed: ByteArray, row: ByteArray) {
        for (input in row.indices) row[input] = (packed[input].toInt() xor 0x80).toByte()
    }

    private fun map(offset: Long, bytes: Long): ByteBuffer =
        file.channel.map(FileChannel.MapMode.READ_ONLY, offset, bytes).order(ByteOrder.LITTLE_ENDIAN)

    /** Numbers whose scale per block is brought to one per row. */
    private inner class Requantised(private val matrix: PromptMatrix) {
        private val count = matrix.outputs.toLong() * matrix.blocks
        private val zerosPerRow = (matrix.blocks * matrix.bits + 7) / 8
        private val scales = map(matrix.scales, 4 * count).asFloatBuffer()
        private val rowScales = map(matrix.rowScale!!, 4L * matrix.outputs).asFloatBuffer()
        private val zeros = matrix.zeros?.let { map(it, matrix.outputs.toLong() * zerosPerRow) }

        fun fill(packed: ByteArray, output: Int, row: ByteArray) {
            for (input in row.indices) {
                val block = input / matrix.block
                val code = unpacked(packed[if (matrix.bits == 4) input / 2 else input].toInt(), input)
                val value = (code - zero(output, block)) * scales.get(output * matrix.blocks + block)
                row[input] = Math.rint((value / rowScales.get(output)).toDouble()).toInt().toByte()
            }
        }

        private fun zero(output: Int, block: Int): Float {
            if (zeros == null) return (1 shl (matrix.bits - 1)).toFloat()
            val byte = zeros.get(output * zerosPerRow + (if (matrix.bits == 4) block / 2 else block)).toInt()
            return unpacked(byte, block)
        }

        /** Two codes of 4 bits stand in a byte, the first in its low half. */
        private fun unpacked(byte: Int, place: Int): Float = when {
            matrix.bits == 8 -> byte and 0xFF
            place % 2 == 0 -> byte and 0x0F
            else -> (byte shr 4) and 0x0F
        }.toFloat()
    }

    private companion object {
        const val TILE_ROWS = 64 // so that the transposed bytes are written in runs
    }
}
