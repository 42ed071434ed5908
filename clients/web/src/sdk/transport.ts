//! One MQTT connection, as the client sees it. mqtt.ts makes real ones, tests make their own.

/** Opens MQTT connections. A link is one attempt to connect and what comes of it; it never connects again. */
export interface Transport {
  /** Begins to connect. What comes is told after this has returned, and nothing any more once the link was ended. */
  open(login: Login, tell: (event: LinkEvent) => void): Link;
}

export interface Login {
  server: string;
  user: string;
  device: string;
  password?: string;
  /** How long the server waits for a sign of life, and half as long again. */
  keepAliveS: number;
}

export type LinkEvent =
  /** The server accepted the connection; what it allows and asks for. */
  | { is: 'connected'; publishesPerS?: number; keepAliveS?: number }
  /** The subscriptions are there. */
  | { is: 'subscribed' }
  | { is: 'published'; published: Published }
  | { is: 'ponged' }
  /** The last. */
  | { is: 'ended'; ended: Ended };

/** Something that was published to us. */
export interface Published {
  topic: string;
  /** `undefined` if it is not UTF-8. */
  text: string | undefined;
  /** It waited for us. */
  waited: boolean;
  /** By what it is acknowledged; absent if it wants no acknowledgement. */
  packet?: number;
}

/** Why a link ended, as far as it matters for what is done next: `lost` is tried again. */
export interface Ended {
  why: 'lost' | 'taken_over' | 'login_refused' | 'refused';
  message: string;
}

export interface Link {
  subscribe(filters: { topic: string; qos: 0 | 1 }[]): void;
  /** At QoS 1: it is answered, unless the link ends before. */
  publish(topic: string, text: string, responseTopic: string | undefined, answered: (answer: Answer) => void): void;
  /** At QoS 0. */
  publishUnanswered(topic: string, text: string): void;
  acknowledge(packet: number): void;
  ping(): void;
  /** Says goodbye behind all that was published, and ends. */
  close(): void;
  /** Ends at once. */
  end(): void;
}

/** The server's answer to a publish. */
export type Answer =
  /** A message is on disk. */
  | { is: 'stored'; seq: number; at: number; receiverAway: boolean }
  /** Whatever else was asked is done, or understood. */
  | { is: 'done' }
  | Refused;

export interface Refused {
  is: 'refused';
  code: string;
  message: string;
}

/** It may succeed a little later, as it is. */
export function isPassing(refused: Refused): boolean {
  return refused.code === 'unavailable' || refused.code === 'too_fast';
}
