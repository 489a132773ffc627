"""Print what models answer to a prompt: generate.py PROMPT FOLDER [FOLDER ...]. Stock transformers, no headwise."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

prompt, *folders = sys.argv[1:]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(f"{folder}: {tokenizer.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
