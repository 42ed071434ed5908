// A message that the server refuses is shown with the reason, survives a reload, and can be sent again or thrown away. The server knows its users.
// node refused.mjs /usr/bin/chromium http://127.0.0.1:8080/ alice PASSWORD nobody [MESSAGE_BYTES]
import { more, must, scenario, step } from "./stage.mjs";

const [user, password, nobody, messageBytes = "16384"] = more;

await scenario(async (stage) => {
  const context = await stage.context();
  const stranger = await stage.page(context, "a stranger");
  await stranger.page.fill("input[name=username]", user);
  await stranger.page.getByRole("button", { name: "Continue" }).click();
  await stranger.until(() => document.querySelector("input[name=password]") !== null, "the page asks for a password");
  await stranger.page.fill("input[name=password]", `${password}-wrong`);
  await stranger.page.getByRole("button", { name: "Continue" }).click();
  await stranger.until(() => document.querySelector("#login-told")?.textContent.startsWith("The server did not let you in"), "a wrong password is refused with a sentence");
  await stranger.page.fill("input[name=password]", password);
  await stranger.page.getByRole("checkbox").check();
  await stranger.page.getByRole("button", { name: "Continue" }).click();
  await stranger.until(() => document.querySelector(".app") !== null, "logged in with a password");
  step("a wrong password is refused, the right one is not");

  await stranger.open(nobody);
  await stranger.write("is anybody there?");
  await stranger.until(() => document.querySelector(".message-failure")?.textContent.length > 20, "why it was not sent");
  const why = await stranger.page.textContent(".message-failure bdi");
  must(why.includes(nobody) || /user/.test(why), `the reason does not help: ${why}`);
  step(`a refused message is shown with the reason: ${why}`);

  await stranger.page.reload();
  await stranger.until(() => document.querySelector(".app") !== null, "still logged in in this tab");
  await stranger.until(() => document.querySelector(".message-failure") !== null, "the refused message after a reload");
  step("it survives a reload");

  await stranger.page.locator(".message-failure .link-button").click();
  await stranger.until(() => document.querySelectorAll(".message-failure").length === 1, "it is tried again and refused again");
  await stranger.choose("is anybody there?", "Throw away");
  await stranger.until(() => document.querySelector(".message") === null, "it is thrown away");
  await stranger.page.reload();
  await stranger.until(() => document.querySelector(".app") !== null, "logged in");
  await stranger.open(nobody);
  await stranger.until(() => document.querySelector(".message") === null && document.querySelector(".top-text") !== null, "it stays away");
  step("it can be tried again and thrown away");

  await stranger.page.fill(".compose textarea", "ü".repeat(Number(messageBytes) / 2 + 1));
  await stranger.until(() => document.querySelector(".compose-problem")?.textContent.includes("too long"), "it says that it is too long");
  await stranger.page.press(".compose textarea", "Enter");
  must((await stranger.page.inputValue(".compose textarea")).length > 10, "what was too long is gone");
  step("what is too long is said at once, and stays");
});
