// Records the automatic retries of openai-node and prints them as one JSON document.
// Arguments: the base URL, a key without bounds, a key with one request a minute, and the base URL
// of a gateway that cannot read the outputs.
import OpenAI from "openai";

const [baseURL, key, boundKey, storelessURL] = process.argv.slice(2);

async function drawing(prompts, options) {
  const found = { statuses: [], images: 0, error: null };
  const openai = new OpenAI({
    ...options,
    fetch: async (...request) => {
      const answer = await fetch(...request);
      found.statuses.push(answer.status);
      return answer;
    },
  });
  try {
    for (const prompt of prompts) {
      found.images += (await openai.images.generate({ prompt })).data.length;
    }
  } catch (problem) {
    found.error = { code: problem.code, job: problem.headers.get("x-request-id") };
  }
  return found;
}

const found = {
  failed: await drawing(["raises"], { baseURL, apiKey: key }),
  unread: await drawing(["a"], { baseURL: storelessURL, apiKey: key }),
  bound: await drawing(["a", "b"], { baseURL, apiKey: boundKey }),
};
console.log(JSON.stringify(found));
