// What llama.cpp says of a GGUF file: node answer.mjs MODEL.gguf < {"texts": [...]} or {"ids": [[...]]} > JSON
//
// For each: its token ids, the log-probability of each token after the first, and `tokens` greedy ones.
import {readFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const {texts = [], ids = [], tokens = 0} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: 2});
const model = await llama.loadModel({modelPath: process.argv[2], gpuLayers: 0, useMmap: false});
const first = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
const inputs = [...texts.map((text) => [...first, ...model.tokenize(text, false)]), ...ids];
const options = {generateNext: {probabilities: true, options: {temperature: 0}}};
const likeliest = (step) => step.next.probabilities.entries().next().value[0];
const answers = [];
for (const input of inputs) {
    const context = await model.createContext({contextSize: 512, flashAttention: false});
    const sequence = context.getSequence();
    const output = await sequence.controlledEvaluate(input.map((token) => [token, options]));
    const logs = input.slice(1).map((token, index) => Math.log(output[index].next.probabilities.get(token) ?? 0));
    const greedy = [];
    for (let next = likeliest(output.at(-1)); greedy.length < tokens; ) {
        greedy.push(next);
        const [step] = await sequence.controlledEvaluate([[next, options]]);
        next = likeliest(step);
    }
    answers.push({ids: input, logs, greedy});
    await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
