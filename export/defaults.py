"""What jql-export takes where nothing is said: the encoder and the heads of the JQL paper."""

SNOWFLAKE = "Snowflake/snowflake-arctic-embed-m-v2.0"
EDU_REPOSITORY = "Jackal-AI/JQL-Edu-Heads"
# They read the embeddings of SNOWFLAKE; names as in the original pipeline.
EDU_HEADS = {
    "Edu-JQL-Gemma-SF": "checkpoints/edu-gemma-snowflake-balanced.ckpt",
    "Edu-JQL-Mistral-SF": "checkpoints/edu-mistral-snowflake-balanced.ckpt",
    "Edu-JQL-Llama-SF": "checkpoints/edu-llama-snowflake-balanced.ckpt",
}
