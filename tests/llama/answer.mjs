// What llama.cpp says of a GGUF file: node answer.mjs MODEL.gguf < {"texts": [...], "tokens": n} > JSON
//
// For every text: its token ids, the log-probability of each token after the first, and n greedy tokens.
import {readFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const {texts, tokens} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: 2});
const model = await llama.loadModel({modelPath: process.argv[2], gpuLayers: 0, useMmap: false});
const answers = [];
for (const text of texts) {
    const context = await model.createContext({contextSize: 512, flashAttention: false});
    const sequence = context.getSequence();
    const ids = model.tokenize(text, false);
    const input = model.tokens.shouldPrependBosToken ? [model.tokens.bos, ...ids] : ids;
    const options = {generateNext: {probabilities: true, options: {temperature: 0}}};
    const output = await sequence.controlledEvaluate(input.map((token) => [token, options]));
    const logs = input.slice(1).map((token, index) => Math.log(output[index].next.probabilities.get(token) ?? 0));
    const greedy = [];
    let next = output.at(-1).next.probabilities.entries().next().value[0];
    while (greedy.length < tokens) {
        greedy.push(next);
        const [step] = await sequence.controlledEvaluate([[next, options]]);
        next = step.next.probabilities.entries().next().value[0];
    }
    answers.push({ids: input, logs, greedy, text: model.detokenize(greedy)});
    await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
