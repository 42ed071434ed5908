// A frame whose user the server does not let in: the page around it is told, the frame says why, and another token lets the user in.
// node unwelcome.mjs /usr/bin/chromium http://127.0.0.1:8080/ alice PASSWORD bob
import { address, more, must, scenario, step } from "./stage.mjs";

const [user, password, peer] = more;

const HOST = `<!doctype html><title>a shop</title><iframe title="chat" src="/embed.html" width="340" height="500"></iframe><script>
  const frame = document.querySelector("iframe");
  window.told = [];
  window.logIn = (token) => {
    window.token = token;
    frame.contentWindow.postMessage({ chat: "login", user: ${JSON.stringify(user)}, token, with: ${JSON.stringify(peer)} }, location.origin);
  };
  addEventListener("message", ({ source, data }) => {
    if (source !== frame.contentWindow) return;
    told.push(data);
    // Whose token is refused is asked for another, some times.
    if (data.chat === "token") window.logIn(window.token);
  });
</script>`;

await scenario(async (stage) => {
  const context = await stage.context();
  const url = new URL("/a-shop.html", address).href;
  await context.route(url, (route) => route.fulfill({ contentType: "text/html", body: HOST }));
  const shop = await stage.page(context, "the shop", url);
  const frame = shop.page.frameLocator("iframe");
  await shop.until(() => window.told.some(({ chat }) => chat === "ready"), "the frame is ready");
  await shop.page.evaluate(() => window.logIn("of yesterday"));
  await shop.until(() => window.told.some(({ chat }) => chat === "closed"), "the page is told that it is closed");
  const closed = (await shop.page.evaluate(() => window.told)).filter(({ chat }) => chat === "closed");
  must(closed.length === 1 && closed[0].code === "login_refused" && closed[0].message.length > 5, `the page is told ${JSON.stringify(closed)}`);
  const said = await frame.locator("[role=alert]").textContent();
  must(said.includes(closed[0].message), `the frame says ${said}`);
  must((await frame.locator("input").count()) === 0, "the frame asks for a password");
  step(`a refused login is told to the page and in the frame: ${closed[0].message}`);

  await shop.page.evaluate((token) => window.logIn(token), password);
  await frame.locator(".compose textarea").waitFor();
  must((await shop.page.evaluate(() => window.told.filter(({ chat }) => chat === "closed").length)) === 1, "the page is told twice");
  step("another token lets the user in");
});
