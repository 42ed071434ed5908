//! Names that are made anew: of messages, and of a page's device.

/** A UUID of version 7: by the time, and 74 random bits. */
export function newId(nowMs: number): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const time = Math.max(0, Math.trunc(nowMs)).toString(16).padStart(12, '0').slice(-12);
  const rest = [...bytes.subarray(6)].map((byte, at) => {
    const marked = at === 0 ? 0x70 | (byte & 0x0f) : at === 2 ? 0x80 | (byte & 0x3f) : byte;
    return marked.toString(16).padStart(2, '0');
  });
  return `${time}${rest.join('')}`.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

/** 22 random characters of `A-Za-z0-9_-`: 132 bits. */
export function randomName(): string {
  const letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-';
  return [...crypto.getRandomValues(new Uint8Array(22))].map((byte) => letters[byte & 63]).join('');
}

/** For a page that keeps no device of its own: a new device each time. */
export function newDevice(): string {
  return `web-${randomName()}`;
}
