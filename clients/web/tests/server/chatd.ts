//! A real chatd with a folder of its own, on free ports of loopback. It signals no process that it did not start.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

export class Chatd {
  #child: ChildProcess | undefined;
  #http = '127.0.0.1:0';

  private constructor(
    readonly folder: string,
    readonly environment: Record<string, string>,
  ) {}

  /** With settings as in config/chatd.toml: `{ 'limits.window': 8 }`. */
  static async start(settings: Record<string, string | number> = {}, folder?: string): Promise<Chatd> {
    const environment = Object.fromEntries(
      Object.entries(settings).map(([key, value]) => [`CHATD__${key.toUpperCase().replace('.', '__')}`, String(value)]),
    );
    const chatd = new Chatd(folder ?? (await mkdtemp(join(tmpdir(), 'chatd-web-'))), environment);
    await chatd.run();
    return chatd;
  }

  get server(): string {
    return `ws://${this.#http}/mqtt`;
  }

  /** Begins, on the ports and with the folder that it had. */
  async run(): Promise<void> {
    const child = spawn(program(), ['--mqtt-listen', '127.0.0.1:0', '--http-listen', this.#http, '--data', join(this.folder, 'data')], {
      env: { ...process.env, ...this.environment },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    this.#child = child;
    for await (const line of createInterface({ input: child.stdout })) {
      const [, address] = /^http listening on (.*)$/.exec(line) ?? [];
      if (address === undefined) continue;
      this.#http = address;
      child.stdout.resume();
      return;
    }
    throw new Error('chatd did not start');
  }

  /** As a crash does. */
  async kill(): Promise<void> {
    const child = this.#child;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
  }

  async end(): Promise<void> {
    await this.kill();
    await rm(this.folder, { recursive: true });
  }
}

/** The program, as CHATD_BIN says. */
export function program(): string {
  const path = process.env.CHATD_BIN;
  if (!path) throw new Error('CHATD_BIN is to name the program: CHATD_BIN=../../target/debug/chatd npm run test:server');
  return path;
}
