// The signature that LiteRT publishes for its Interpreter API. Calls go to a process of ours that runs the real LiteRT.
package org.tensorflow.lite;

import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;

public final class Interpreter implements AutoCloseable {
    public static class Options {
        int threads = 1;
        boolean xnnpack = true;

        public Options setNumThreads(int numThreads) {
            threads = numThreads;
            return this;
        }

        public Options setUseXNNPACK(boolean useXNNPACK) {
            xnnpack = useXNNPACK;
            return this;
        }
    }

    private static final class Described implements Tensor {
        final DataType type;
        final int[] shape;

        Described(String type, String shape) {
            this.type = DataType.valueOf(type.toUpperCase(Locale.ROOT));
            this.shape = shape.isEmpty() ? new int[0] : java.util.Arrays.stream(shape.split(",")).mapToInt(Integer::parseInt).toArray();
        }

        public DataType dataType() {
            return type;
        }

        public int[] shape() {
            return shape;
        }

        public int numBytes() {
            int count = type == DataType.INT8 ? 1 : 4;
            for (int size : shape) count *= size;
            return count;
        }
    }

    private final Process process;
    private final DataOutputStream to;
    private final DataInputStream from;
    private final Map<String, TreeMap<String, Described>> inputs = new TreeMap<>();
    private final Map<String, TreeMap<String, Described>> outputs = new TreeMap<>();

    public Interpreter(File modelFile, Options options) {
        try {
            String[] command = System.getProperty("litert.server").split("\n");
            ProcessBuilder builder = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT);
            builder.command().add(modelFile.getPath());
            builder.command().add(Integer.toString(options.threads));
            process = builder.start();
            to = new DataOutputStream(new java.io.BufferedOutputStream(process.getOutputStream(), 1 << 16));
            from = new DataInputStream(new java.io.BufferedInputStream(process.getInputStream(), 1 << 16));
            while (true) {
                String line = from.readUTF();
                if (line.isEmpty()) break;
                String[] parts = line.split("\t", -1); // input or output, signature, name, type, shape
                Map<String, TreeMap<String, Described>> side = parts[0].equals("input") ? inputs : outputs;
                side.computeIfAbsent(parts[1], key -> new TreeMap<>()).put(parts[2], new Described(parts[3], parts[4]));
            }
        } catch (IOException error) {
            throw new IllegalArgumentException("the model cannot be opened: " + error.getMessage());
        }
    }

    public String[] getSignatureKeys() {
        return inputs.keySet().toArray(new String[0]);
    }

    public String[] getSignatureInputs(String signatureKey) {
        return known(inputs, signatureKey).keySet().toArray(new String[0]);
    }

    public Tensor getInputTensorFromSignature(String inputName, String signatureKey) {
        return known(inputs, signatureKey).get(inputName);
    }

    public void runSignature(Map<String, Object> given, Map<String, Object> taken, String signatureKey) {
        TreeMap<String, Described> wanted = known(inputs, signatureKey);
        if (!given.keySet().equals(wanted.keySet())) throw refused("inputs are " + given.keySet() + ", not " + wanted.keySet());
        try {
            to.writeUTF(signatureKey);
            for (Map.Entry<String, Described> entry : wanted.entrySet()) {
                ByteBuffer buffer = checked(given.get(entry.getKey()), entry.getKey(), entry.getValue());
                byte[] bytes = new byte[buffer.capacity()];
                ByteBuffer all = buffer.duplicate(); // a direct buffer is read from its address, whatever its position
                all.clear();
                all.get(bytes);
                to.write(bytes);
            }
            to.flush();
            for (Map.Entry<String, Described> entry : known(outputs, signatureKey).entrySet()) {
                byte[] bytes = new byte[entry.getValue().numBytes()];
                from.readFully(bytes);
                Object target = taken.get(entry.getKey());
                if (target == null) continue; // not asked for
                checked(target, entry.getKey(), entry.getValue()).put(bytes); // from its position on, as Buffer.put does
            }
        } catch (IOException error) {
            throw new IllegalArgumentException("the runtime failed: " + error.getMessage());
        }
    }

    private static ByteBuffer checked(Object value, String name, Described tensor) {
        if (!(value instanceof ByteBuffer)) throw refused(name + ": this stand-in knows ByteBuffers");
        ByteBuffer buffer = (ByteBuffer) value;
        if (!buffer.isDirect() || buffer.order() != ByteOrder.nativeOrder()) throw refused(name + ": no direct buffer in native order");
        if (buffer.capacity() != tensor.numBytes()) throw refused(name + ": " + buffer.capacity() + " bytes, not " + tensor.numBytes());
        return buffer;
    }

    private static IllegalArgumentException refused(String reason) {
        return new IllegalArgumentException(reason);
    }

    private static TreeMap<String, Described> known(Map<String, TreeMap<String, Described>> side, String signature) {
        TreeMap<String, Described> found = side.get(signature);
        if (found == null) throw new IllegalArgumentException("no signature " + signature);
        return found;
    }

    @Override
    public void close() {
        process.destroy();
    }
}
