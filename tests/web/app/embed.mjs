// The chat in a frame of another page: who the user is comes by message, with a token for each connection, and it is one conversation.
// node embed.mjs /usr/bin/chromium http://127.0.0.1:8080/ [ALICE-TOKEN BOB-TOKEN]; in development mode any word is a token
import { address, more, nameOf, scenario, step } from "./stage.mjs";

const [aliceToken, bobToken] = more;

/** A page of ours with a frame; only where the operator allows it may it be another site's. */
const host = (user, token, peer) => `<!doctype html><title>a shop</title><iframe title="chat" src="/embed.html" width="600" height="500"></iframe><script>
  const frame = document.querySelector("iframe");
  addEventListener("message", ({ source, data }) => {
    if (source !== frame.contentWindow) return;
    (window.asked ??= []).push(data.chat);
    source.postMessage({ chat: "login", user: ${JSON.stringify(user)}, token: ${JSON.stringify(token)}, with: ${JSON.stringify(peer)} }, location.origin);
  });
</script>`;

await scenario(async (stage) => {
  const [a, b] = aliceToken ? ["alice", "bob"] : [nameOf("alice"), nameOf("bob")];
  const wire = await stage.wire();
  const visit = async (user, token, peer) => {
    const context = await stage.context();
    const url = new URL("/a-shop.html", wire.url).href;
    await context.route(url, (route) => route.fulfill({ contentType: "text/html", body: host(user, token, peer) }));
    const person = await stage.page(context, user, url);
    person.frame = person.page.frameLocator("iframe");
    return person;
  };
  const alice = await visit(a, aliceToken ?? "word", b);
  const bob = await visit(b, bobToken ?? "word", a);
  await alice.frame.locator(".compose textarea").fill("hello from a shop");
  await alice.frame.locator(".compose textarea").press("Enter");
  await bob.frame.locator(".words", { hasText: "hello from a shop" }).waitFor();
  await alice.frame.locator(".tick-read, .tick-delivered").first().waitFor();
  step("two frames on other pages talk");

  wire.cut();
  await alice.frame.locator(".banner-lost").waitFor();
  wire.mend();
  await alice.frame.getByRole("button", { name: "Try now" }).click({ timeout: 5_000 }).catch(() => {});
  await alice.frame.locator(".banner-lost").waitFor({ state: "detached" });
  await alice.until(() => window.asked.includes("token"), "the frame asks for a new token");
  step("after a lost connection the page is asked for a new token");
});
