// llama.cpp, through node-llama-cpp: probabilities of the whole vocabulary after every token. See deployments.py.
import {openSync, readFileSync, writeSync} from "node:fs";
import {getLlama} from "node-llama-cpp";
import {report} from "./timing.mjs";

const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: asked.threads});
const model = await llama.loadModel({modelPath: asked.file, gpuLayers: 0});
const options = {generateNext: {probabilities: true, options: {temperature: 0}}};
const file = openSync(asked.out, "w");
for (const window of asked.windows) {
    const context = await model.createContext({contextSize: 512, flashAttention: false, threads: asked.threads});
    const steps = await context.getSequence().controlledEvaluate(window.map((token) => [token, options]));
    for (const {next} of steps) {
        const logits = new Float32Array(asked.vocabulary).fill(-Infinity);
        for (const [token, probability] of next.probabilities) logits[token] = Math.log(Math.max(probability, 1e-30));
        writeSync(file, new Uint8Array(logits.buffer));
    }
    await context.dispose();
}
const written = async (count) => {
    const context = await model.createContext({contextSize: 512, flashAttention: false, threads: asked.threads});
    const greedy = [];
    for await (const token of context.getSequence().evaluate(asked.prompt, {temperature: 0, yieldEogToken: true})) {
        greedy.push(token);
        if (greedy.length === count) break;
    }
    await context.dispose();
    return greedy;
};
await report(written, asked.tokens);
process.exit(0);
