//! The SDK: chat over MQTT for programs in a browser. docs/web-sdk.md has the first steps, api.ts the contract.

export * from './api.js';
export { start } from './client.js';
export { systemClock } from './clock.js';
export { indexedDbOutbox, type Locks } from './indexed-db.js';
export { mqttTransport } from './mqtt.js';
export { newDevice, newId } from './names.js';
export { memoryOutbox } from './outbox.js';
export type { Answer, Ended, Link, LinkEvent, Login, Published, Refused } from './transport.js';
