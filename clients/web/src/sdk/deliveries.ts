//! What the server has delivered and the program has not taken yet.
//!
//! Pure. Invariants: an entry is handed to the program once, whatever the connection does; acknowledgements leave in the order of arrival on
//! the connection by which the packet came; nothing is acknowledged that the program did not take. What is kept is bounded by the receive
//! maximum, and a place for each conversation.

export interface Arrival {
  conversation: string;
  seq: number;
  at: number;
}

type Key = string;

export class Deliveries {
  /** The last entry of each conversation that came. */
  #last = new Map<string, { seq: number; at: number }>();
  /** Not taken yet: whether the program has it, or let go of it. */
  #held = new Map<Key, 'program' | 'nobody'>();
  /** Packets of this connection that are not acknowledged, in the order of arrival. */
  #packets: { packet: number; key: Key | undefined }[] = [];

  /** Whether the program is to have it: it has not, and had not. */
  arrived(arrival: Arrival, packet: number): boolean {
    const key = keyOf(arrival);
    this.#packets.push({ packet, key });
    const holder = this.#held.get(key);
    if (holder !== undefined) {
      this.#held.set(key, 'program');
      return holder === 'nobody';
    }
    // Time never runs backwards in a conversation: a server that counts anew, from a backup, has other entries under these numbers.
    const last = this.#last.get(arrival.conversation);
    if (last && arrival.seq <= last.seq && arrival.at <= last.at) return false;
    this.#last.set(arrival.conversation, { seq: arrival.seq, at: arrival.at });
    this.#held.set(key, 'program');
    return true;
  }

  /** Something that is nothing for the program. */
  passed(packet: number): void {
    this.#packets.push({ packet, key: undefined });
  }

  /** The program has it now. */
  taken(arrival: Arrival): void {
    this.#held.delete(keyOf(arrival));
  }

  /** The program let go of it: it is to have it again. Whether a packet of this connection waits for it, for ever. */
  dropped(arrival: Arrival): boolean {
    const key = keyOf(arrival);
    if (this.#held.has(key)) this.#held.set(key, 'nobody');
    return this.#packets.some((packet) => packet.key === key);
  }

  /** The next packet that may be acknowledged. */
  nextAcknowledged(): number | undefined {
    const first = this.#packets[0];
    if (!first || (first.key !== undefined && this.#held.has(first.key))) return undefined;
    return this.#packets.shift()?.packet;
  }

  /** The server sends what was not acknowledged again. */
  disconnected(): void {
    this.#packets = [];
  }
}

function keyOf({ conversation, seq }: Arrival): Key {
  return `${conversation} ${seq}`;
}
