// onnxruntime-node, or onnxruntime-web run by node. See deployments.py.
import {openSync, readFileSync, writeSync} from "node:fs";
import {report} from "./timing.mjs";

const asked = JSON.parse(readFileSync(0, "utf8"));
const {InferenceSession, Tensor} = await import(`onnxruntime-${asked.how}`);
const data = (name) => new Uint8Array(readFileSync(`${asked.file}/${name}`));
const session =
    asked.how === "node"
        ? await InferenceSession.create(`${asked.file}/model.onnx`, {intraOpNumThreads: asked.threads})
        : await InferenceSession.create(data("model.onnx"), {
              executionProviders: ["wasm"],
              externalData: [{path: "model.onnx.data", data: data("model.onnx.data")}],
          });

const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const past = session.inputMetadata.filter(({name}) => name.startsWith("past_key_values"));
const empty = () => past.map(({type, shape}) => new Tensor(type, [], [1, shape[1], 0, shape[3]]));
const step = async (ids, cache, before) => {
    const feeds = Object.fromEntries(past.map(({name}, index) => [name, cache[index]]));
    feeds.input_ids = int64(ids);
    feeds.attention_mask = int64(Array(before + ids.length).fill(1));
    if (session.inputNames.includes("position_ids")) feeds.position_ids = int64(ids.map((_, index) => before + index));
    const answer = await session.run(feeds);
    return [answer.logits, past.map(({name}) => answer[name.replace("past_key_values", "present")])];
};
const file = openSync(asked.out, "w");
for (const window of asked.windows) {
    const [logits] = await step(window, empty(), 0);
    const floats = Float32Array.from(logits.data);
    writeSync(file, new Uint8Array(floats.buffer));
}
const written = async (count) => {
    const greedy = [];
    let [ids, cache, before] = [asked.prompt, empty(), 0];
    while (greedy.length < count) {
        const [logits, next] = await step(ids, cache, before);
        [before, cache] = [before + ids.length, next];
        const last = logits.data.slice(-logits.dims[2]);
        greedy.push(last.indexOf(last.reduce((most, value) => Math.max(most, value))));
        ids = greedy.slice(-1);
    }
    return greedy;
};
await report(written, asked.tokens);
