// Greedy generation from a model bundle with onnxruntime-web: prefill, then one token at a time after the cache.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need a page that is isolated from other origins
ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;

const integers = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

export class Model {
  static async load(url) {
    return new Model(await ort.InferenceSession.create(url));
  }

  constructor(session) {
    this.session = session;
    this.pasts = session.inputNames.filter((name) => name.startsWith("past_key_values."));
    this.shapes = Object.fromEntries(session.inputMetadata.map((input) => [input.name, input.shape]));
  }

  // The tokens after a prompt, one by one: `for await (const token of model.generate(ids, 40))`.
  async *generate(prompt, count) {
    let cache = Object.fromEntries(this.pasts.map((name) => [name, this.#empty(name)]));
    let past = 0;
    let fresh = prompt;
    for (let step = 0; step < count; step += 1) {
      const total = past + fresh.length;
      const outputs = await this.session.run({
        input_ids: integers(fresh),
        attention_mask: integers(Array(total).fill(1)),
        position_ids: integers(fresh.map((_, index) => past + index)),
        ...cache,
      });
      cache = Object.fromEntries(this.pasts.map((name) => [name, outputs[name.replace("past_key_values", "present")]]));
      past = total;
      fresh = [mostProbable(outputs.logits)];
      yield fresh[0];
    }
  }

  #empty(name) {
    const [, heads, , width] = this.shapes[name];
    return new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]);
  }
}

// The first of the largest logits at the last position.
function mostProbable(logits) {
  const last = logits.data.subarray(-logits.dims[2]);
  return last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
}
