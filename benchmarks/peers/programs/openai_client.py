"""OpenAI's own client, with all requests at once: {"url", "bodies": [...]} in; what each stream's events tell, out."""
# /// script
# dependencies = ["openai"]
# ///

import asyncio
import json
import sys
import time

import openai


async def one(client, body, start):
    sent, times = time.perf_counter() - start, []
    own = {"cache_salt": body.pop("cache_salt")}  # OpenAI's has none
    stream = await client.completions.create(**body, extra_body=own)
    async for event in stream:
        if event.choices and event.choices[0].text:
            times.append(time.perf_counter() - start)
    return {"sent": sent, "times": times}


async def main():
    asked = json.load(sys.stdin)
    client = openai.AsyncOpenAI(base_url=f"{asked['url']}/v1", api_key="none", max_retries=0)
    start = time.perf_counter()
    print(json.dumps(await asyncio.gather(*(one(client, body, start) for body in asked["bodies"]))))


if __name__ == "__main__":
    asyncio.run(main())
