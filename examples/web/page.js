// The page: the sample's tokens are bytes, so that it needs no tokenizer.

import { Model } from "./generate.js";

const [form, prompt, count, write, status, text] = ["form", "prompt", "count", "write", "status", "text"].map((id) =>
  document.getElementById(id),
);

async function run(model) {
  write.disabled = true;
  const tokens = [...new TextEncoder().encode(prompt.value)];
  const start = performance.now();
  let written = 0;
  for await (const token of model.generate(tokens.slice(), count.valueAsNumber)) {
    tokens.push(token);
    written += 1;
    text.textContent = new TextDecoder().decode(Uint8Array.from(tokens));
  }
  const seconds = (performance.now() - start) / 1000;
  status.textContent = `${written} tokens, ${Math.round(written / seconds)} a second`;
  document.body.dataset.tokens = JSON.stringify(tokens); // for those who check them
}

const fail = (error) => {
  status.textContent = `This did not work: ${error.message}`;
};

try {
  const model = await Model.load("model/model.onnx");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(model)
      .catch(fail)
      .finally(() => (write.disabled = false));
  });
  status.textContent = "The model is ready.";
  write.disabled = false;
} catch (error) {
  fail(error);
}
