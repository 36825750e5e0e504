"""The page at / in a real browser, asking a real server."""

import asyncio
import html
import json
import re

import httpx
import pytest
from browser_utils import browse, needs_chromium
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

pytestmark = needs_chromium

# Appended to the page: what a person does; what comes of it is left on the document. The picture keeps the browser from
# saying that the page is loaded until all is done.
ACTIONS = """<img src="hold"><script>
const fields = form.elements, out = [], count = (kind) => document.querySelectorAll("#canvas " + kind).length;
const idle = () => new Promise((resolve) => {
  const look = () => running ? setTimeout(look, 10) : resolve();
  look();
});
async function send(values) {
  for (const [name, value] of Object.entries(values)) fields[name].value = value;
  $("send").click();
  await idle();
  const token = document.querySelector("#canvas .tok");
  if (token) token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  out.push({
    status: $("status").textContent, text: $("text").textContent, facts: $("facts").textContent, tip: tip.textContent,
    tokens: count(".tok"), blocks: count(".block"), edges: count(".edge"), chunks: Number($("canvas").dataset.chunks),
  });
}
(async () => {
  await send({ kind: "text", prompt: "<b>5", max_tokens: "40", seed: "3" });
  await send({ kind: "chat", prompt: "hello", max_tokens: "12", strategy: "static", denoising_steps: "2" });
  await send({ temperature: "hot" });
  await send({ temperature: "1", denoising_steps: "", strategy: "", max_tokens: "60" });
  document.body.dataset.out = JSON.stringify(out);
  fetch("done");
})();
</script>"""


@pytest.fixture
def acted(server):
    """Address of the page with ACTIONS."""
    answer = httpx.get(f"{server.url}/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    done = asyncio.Event()

    async def page(_request):
        return HTMLResponse(answer.text + ACTIONS)

    async def hold(_request):
        await asyncio.wait_for(done.wait(), 60)
        return Response()

    async def finish(_request):
        done.set()
        return Response()

    routes = [Route("/acted", page), Route("/hold", hold), Route("/done", finish)]
    server.server.app.router.routes[:0] = routes
    yield f"{server.url}/acted"
    del server.server.app.router.routes[: len(routes)]


def test_blocks_appear_as_the_answer_comes(server, acted, tmp_path):
    dom = browse(tmp_path, "--dump-dom", acted)
    root = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-ready="true"' in root and "data-errors" not in root, root
    text, chat, refused, last = json.loads(html.unescape(re.search(r'data-out="([^"]*)"', dom)[1]))
    with server.client() as client:
        want = client.completions.create(model="tiny", prompt="<b>5", max_tokens=40, seed=3)
    assert text["status"] == "done" and text["text"] == want.choices[0].text
    assert text["tokens"] == want.usage.completion_tokens
    assert text["blocks"] == text["edges"] + 1 == -(-text["tokens"] // 4) and 1 < text["chunks"]
    assert f"tokens {text['tokens']}" in text["facts"] and "prompt tokens 4" in text["facts"]
    assert "revealed at step" in text["tip"] and "probability" in text["tip"]
    assert chat["status"] == "done" and 0 < chat["tokens"] <= 12
    assert refused["status"].startswith("temperature is 'hot'") and refused["tokens"] == 0
    assert last["status"] == "done" and last["tokens"] > 0  # the server's word about the mistake is gone


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn_in_light_and_dark(acted, tmp_path, dark):
    picture = tmp_path / "page.png"
    flags = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    browse(tmp_path, *flags, "--window-size=1100,900", f"--screenshot={picture}", acted)
    assert len(picture.read_bytes()) > 20_000  # a blank page of this size is under 10 kB
