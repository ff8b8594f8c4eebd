// How readers that are JavaScript time what they write. See deployments.py, and timing.py, which does the same.
export const report = async (written, tokens) => {
    const seconds = [];
    let greedy;
    for (const count of [1, tokens, 1, tokens]) {
        const begun = performance.now();
        greedy = await written(count);
        seconds.push((performance.now() - begun) / 1000);
    }
    const least = (first) => Math.min(seconds[first], seconds[first + 2]);
    console.log(JSON.stringify({greedy, seconds: least(1) - least(0)}));
};
