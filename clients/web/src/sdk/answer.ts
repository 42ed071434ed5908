//! What an acknowledgement says.

import type { Answer } from './transport.js';

/** From its reason code, reason string and user properties, whatever they are. */
export function readAnswer(reasonCode: number, reason: string | undefined, property: (name: string) => string | undefined): Answer {
  if (reasonCode >= 0x80) {
    const [, code, sentence] = /^([a-z][a-z0-9_]*)(?::\s*(.*))?$/s.exec(reason ?? '') ?? [];
    const unnamed = reason ?? `the server refused it with reason code 0x${reasonCode.toString(16)}`;
    return { is: 'refused', code: code ?? 'refused', message: sentence || unnamed };
  }
  const [seq, at] = [whole(property('seq')), whole(property('at'))];
  if (seq === undefined || seq === 0 || at === undefined) return { is: 'done' };
  return { is: 'stored', seq, at, receiverAway: reasonCode === 0x10 };
}

/** A whole number in decimal. */
export function whole(text: string | undefined): number | undefined {
  if (text === undefined || !/^[0-9]{1,16}$/.test(text)) return undefined;
  const number = Number(text);
  return Number.isSafeInteger(number) ? number : undefined;
}
