"""MHA, GQA and MQA: merge or repeat the KV heads of a layer."""
