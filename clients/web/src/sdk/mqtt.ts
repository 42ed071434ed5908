//! Connections over mqtt.js, which is loaded when the first is made: it is most of what a page with the SDK weighs.
//!
//! Everything of mqtt.js lives in this file. It is used for its packets and its socket, for one connection at a time; what is sent again is decided above.
//! mqtt.js 5.16's oddities and what guards against them here:
//! - Its acknowledgement of a message (`handleMessage`) stands in the way of every packet behind it: a program that asks the server something before it is done
//!   with a message would wait for ever, and a slow one would lose the connection, as no answer to a ping is read. So messages are hidden from it, and
//!   acknowledged here, by four bytes.
//! - It throws where nobody can catch it when a server sends packets that make no sense at that place. What is not expected is hidden from it, too.
//! - The callback of a publish gets the acknowledgement only if it is a refusal; the numbers of a stored message are in the packet alone. So acknowledgements are
//!   matched here, by the packet identifier that it gave last.
//! - It pings from a worker made of a blob, which a strict Content-Security-Policy forbids, and by a schedule that browsers stretch for hidden pages until the
//!   server gives up. It gets a timer that never rings; the client pings.
//! - It says nothing of a WebSocket that could not be opened but that it is closed.
//! - What the server says of its Maximum Packet Size and Receive Maximum is not heeded, and the server closes: for ever, if the same is done again.

import type { IClientOptions, MqttClient, Packet } from 'mqtt';

import { readAnswer, whole } from './answer.js';
import type { Answer, Ended, Link, LinkEvent, Login, Transport } from './transport.js';

/** Messages that the server has under way to us. */
const RECEIVE_MAXIMUM = 256;
/** An answer is 256 KiB of text at most, and JSON can make six bytes of one. */
const PACKET_BYTES_MAX = 8 * 1024 * 1024;
/** More than the head of a PUBLISH and the topics in it take. */
const HEAD_BYTES_MAX = 1_024;

export function mqttTransport(): Transport {
  return { open: (login, tell) => new MqttLink(login, tell) };
}

class MqttLink implements Link {
  readonly #tell: (event: LinkEvent) => void;
  #client: MqttClient | undefined;
  #accepted = false;
  #over = false;
  #packetBytesMax = Infinity;
  #receiveMaximum = 65_535;
  /** Who waits for which acknowledgement. */
  readonly #answered = new Map<number, (answer: Answer) => void>();
  /** Publishes until the server has room for them. */
  readonly #waiting: (() => void)[] = [];

  constructor(login: Login, tell: (event: LinkEvent) => void) {
    this.#tell = tell;
    import('mqtt').then(
      ({ default: mqtt }) => {
        if (this.#over) return;
        this.#listen(mqtt.connect(login.server, connectOptions(login)));
      },
      () => this.#ended({ why: 'lost', message: 'a part of the program could not be loaded' }),
    );
  }

  #listen(client: MqttClient): void {
    this.#client = client;
    client.on('packetreceive', (packet) => {
      if (this.#over) hide(packet);
      else this.#received(packet);
    });
    client.on('connect', ({ properties }) => {
      if (this.#over) return;
      this.#accepted = true;
      this.#packetBytesMax = properties?.maximumPacketSize ?? Infinity;
      this.#receiveMaximum = properties?.receiveMaximum ?? 65_535;
      const publishesPerS = whole(userProperty(properties, 'publishes_per_s'));
      const keepAliveS = properties?.serverKeepAlive;
      this.#tell({
        is: 'connected',
        ...(publishesPerS === undefined ? {} : { publishesPerS }),
        ...(keepAliveS === undefined ? {} : { keepAliveS }),
      });
    });
    client.on('error', (error) => this.#ended({ why: 'lost', message: error.message || 'the server cannot be reached' }));
    client.on('close', () => this.#ended({ why: 'lost', message: this.#accepted ? 'the connection broke' : 'the server cannot be reached' }));
  }

  #received(packet: Packet): void {
    switch (packet.cmd) {
      case 'connack':
        if (packet.reasonCode) this.#ended(refusedBy(packet.reasonCode, packet.properties?.reasonString));
        return;
      case 'suback': {
        const code = packet.granted.map(Number).find((code) => code >= 0x80);
        if (code === undefined) return this.#tell({ is: 'subscribed' });
        return this.#ended(unsubscribedBy(code, packet.properties?.reasonString));
      }
      case 'publish': {
        const { topic, payload, retain, qos, messageId } = packet;
        hide(packet);
        // Nothing is subscribed to at QoS 2.
        if (qos === 2) return this.#ended(UNEXPECTED);
        const published = { topic, text: utf8(payload), waited: retain };
        return this.#tell({ is: 'published', published: qos === 1 && messageId !== undefined ? { ...published, packet: messageId } : published });
      }
      case 'puback': {
        const { messageId = 0, reasonCode = 0, properties } = packet;
        const answered = this.#answered.get(messageId);
        if (!this.#answered.delete(messageId)) return;
        this.#waiting.shift()?.();
        return answered?.(readAnswer(reasonCode, properties?.reasonString, (name) => userProperty(properties, name)));
      }
      case 'pingresp':
        return this.#tell({ is: 'ponged' });
      case 'disconnect': {
        const message = packet.properties?.reasonString ?? `the server closed the connection with reason code 0x${(packet.reasonCode ?? 0).toString(16)}`;
        if (packet.reasonCode !== 0x8e) return this.#ended({ why: 'lost', message });
        return this.#ended({ why: 'taken_over', message: 'another program connected as the same device' });
      }
      default:
        hide(packet);
        return this.#ended(UNEXPECTED);
    }
  }

  #ended(ended: Ended): void {
    if (this.#over) return;
    this.end();
    this.#tell({ is: 'ended', ended });
  }

  subscribe(filters: { topic: string; qos: 0 | 1 }[]): void {
    // The answer is in the packet.
    this.#client?.subscribe(Object.fromEntries(filters.map(({ topic, qos }) => [topic, { qos }])), () => {});
  }

  publish(topic: string, text: string, responseTopic: string | undefined, answered: (answer: Answer) => void): void {
    const { length } = new TextEncoder().encode(text);
    if (length + HEAD_BYTES_MAX > this.#packetBytesMax) {
      const message = `it is longer than the server takes: ${length} bytes`;
      queueMicrotask(() => answered({ is: 'refused', code: 'text_too_long', message }));
      return;
    }
    const publish = () => {
      const properties = responseTopic === undefined ? {} : { properties: { responseTopic } };
      this.#client?.publish(topic, text, { qos: 1, ...properties }, () => {});
      const packet = this.#client?.getLastMessageId();
      if (packet) this.#answered.set(packet, answered);
    };
    if (this.#waiting.length > 0 || this.#answered.size >= this.#receiveMaximum) this.#waiting.push(publish);
    else publish();
  }

  publishUnanswered(topic: string, text: string): void {
    this.#client?.publish(topic, text, { qos: 0 }, () => {});
  }

  acknowledge(packet: number): void {
    this.#client?.stream.write(Uint8Array.of(0x40, 2, packet >> 8, packet & 0xff));
  }

  ping(): void {
    this.#client?.sendPing();
  }

  close(): void {
    this.#over = true;
    this.#client?.stream.end(Uint8Array.of(0xe0, 0));
  }

  end(): void {
    this.#over = true;
    this.#client?.end(true);
  }
}

const UNEXPECTED: Ended = { why: 'lost', message: 'the server sends what was not asked for' };

/** mqtt.js passes over a packet of a kind that is not sent to clients. */
function hide(packet: Packet): void {
  (packet as { cmd: Packet['cmd'] }).cmd = 'pingreq';
}

function connectOptions({ user, device, password, keepAliveS }: Login): IClientOptions {
  return {
    protocolVersion: 5,
    clientId: device,
    username: user,
    ...(password === undefined ? {} : { password }),
    clean: true,
    properties: { receiveMaximum: RECEIVE_MAXIMUM, maximumPacketSize: PACKET_BYTES_MAX },
    reconnectPeriod: 0,
    resubscribe: false,
    queueQoSZero: false,
    // Both are the client's business.
    connectTimeout: 0x7fff_ffff,
    keepalive: keepAliveS,
    timerVariant: { set: () => 0, clear: () => {} },
  };
}

interface Properties {
  userProperties?: Record<string, string | string[]>;
}

function userProperty(properties: Properties | undefined, name: string): string | undefined {
  const value = properties?.userProperties?.[name];
  return Array.isArray(value) ? value[0] : value;
}

function utf8(payload: string | Uint8Array): string | undefined {
  if (typeof payload === 'string') return payload;
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(payload);
  } catch {
    return undefined;
  }
}

function refusedBy(code: number, reason: string | undefined): Ended {
  switch (code) {
    case 0x86:
    case 0x87:
      return { why: 'login_refused', message: reason ?? 'no such user, or not this password or token' };
    case 0x8a:
      return { why: 'login_refused', message: reason ?? 'this user is banned' };
    case 0x84:
      return { why: 'refused', message: reason ?? 'the server does not speak MQTT 5' };
    case 0x85:
      return { why: 'refused', message: reason ?? 'the server does not take this device name' };
    default:
      return { why: 'lost', message: reason ?? `the server refused the connection with reason code 0x${code.toString(16)}` };
  }
}

function unsubscribedBy(code: number, reason: string | undefined): Ended {
  const message = `the server refused a subscription: ${reason ?? `reason code 0x${code.toString(16)}`}`;
  // What may pass: without a reason, its own fault, quota, packet identifier.
  return { why: [0x80, 0x83, 0x91, 0x97].includes(code) ? 'lost' : 'refused', message };
}
